/**
 * Files that people attach, as text. They are read here, in the browser: the server gets their text
 * in a message. pdf.js and its tables for Chinese, Japanese and Korean come with the first PDF.
 */

const MOST_BYTES = 2 ** 26; // of a file
const MOST_TEXT = 4_000_000; // characters, some megabytes of a request

/**
 * A file's name and text.
 *
 * @throws Error that names the file, and says why it cannot be read
 */
export async function readFile(file) {
  const fail = (why) => Object.assign(new Error(`${file.name}: ${why}`), { name: "FileError" });
  if (file.size > MOST_BYTES) throw fail("larger than 64 MB");
  const bytes = new Uint8Array(await file.arrayBuffer());
  const isPdf = new TextDecoder("latin1").decode(bytes.subarray(0, 1024)).includes("%PDF-");
  let text;
  try {
    text = isPdf ? await pdfText(bytes) : plainText(bytes);
  } catch (error) {
    throw fail(error.message);
  }
  if (!text.trim()) throw fail(isPdf ? "has no text; its pages may be pictures" : "is empty");
  if (text.length > MOST_TEXT) throw fail(`${text.length.toLocaleString("en")} characters are too many`);
  return { name: file.name, text };
}

/** Text in UTF-8, or in UTF-16 that says so. */
function plainText(bytes) {
  const mark = (bytes[0] << 8) | bytes[1];
  const encoding = { 0xfffe: "utf-16le", 0xfeff: "utf-16be" }[mark] ?? "utf-8";
  let text;
  try {
    text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
  } catch {
    throw new Error("neither text in UTF-8 nor a PDF");
  }
  if (text.includes("\0")) throw new Error("neither text in UTF-8 nor a PDF");
  return text.replace(/\r\n?/g, "\n");
}

const vendor = (name) => new URL(`vendor/${name}`, import.meta.url).href;
// The page's policy allows a worker of this address alone.
const WORKER = vendor("pdf.worker.min.mjs");
const policy = globalThis.trustedTypes?.createPolicy("pdf", { createScriptURL: () => WORKER });

/** The words of all pages; an empty line stands between two pages. */
async function pdfText(data) {
  let pdf;
  try {
    pdf = await import("./vendor/pdf.min.mjs");
  } catch {
    throw new Error("PDFs cannot be read: the page's libraries are not there");
  }
  const port = new Worker(policy?.createScriptURL("") ?? WORKER, { type: "module" });
  const reader = pdf.PDFWorker.create({ port });
  const task = pdf.getDocument({
    data, worker: reader, cMapUrl: vendor("cmaps/"), cMapPacked: true, verbosity: 0,
    stopAtErrors: true, // rather than leave out what it does not understand
    disableFontFace: true, useSystemFonts: false, useWasm: false,
  });
  try {
    const document = await task.promise;
    const pages = [];
    for (let i = 1; i <= document.numPages; i += 1) {
      const { items } = await (await document.getPage(i)).getTextContent();
      pages.push(items.map(({ str = "", hasEOL }) => (hasEOL ? `${str}\n` : str)).join("").trim());
    }
    return pages.join("\n\n");
  } catch (error) {
    if (error.name === "PasswordException") throw new Error("protected by a password");
    throw new Error(`this PDF cannot be read: ${error.message}`);
  } finally {
    await task.destroy();
    reader.destroy();
    port.terminate();
  }
}
