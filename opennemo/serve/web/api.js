/** Requests to the server, each with the key, and streams read as they come. */

/** What went wrong, in words for a person; `status` 0 means that no answer came at all. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }

  /** The message, and when to come back. */
  get explanation() {
    return this.retryAfter ? `${this.message} (to be tried again in ${this.retryAfter} s)` : this.message;
  }
}

export const key = {
  get: () => sessionStorage.getItem("key") ?? localStorage.getItem("key") ?? "",
  set(value, keep) {
    this.forget();
    if (value) (keep ? localStorage : sessionStorage).setItem("key", value);
  },
  forget() {
    sessionStorage.removeItem("key");
    localStorage.removeItem("key");
  },
};

let keyNeeded = async () => false;
/** Have `ask(message)` called when the server wants a key; it resolves to whether there is one. */
export function onKeyNeeded(ask) {
  let asking = null; // several requests may fail at once, people are asked once
  keyNeeded = (message) => (asking ??= ask(message).finally(() => (asking = null)));
}

export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/** Tokens of a conversation. Nobody is asked for a key for this alone. */
export async function count(body) {
  return (await (await request("tokenize", body, { asks: false })).json()).count;
}

/** The chunks of a streamed answer. Raises ApiError, or an AbortError after `signal`. */
export async function* chat(body, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", streamed, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader, signal);
      if (done) throw new ApiError("The server hung up in the middle of the answer.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // a keep-alive, or the empty line between events
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, chunk.error);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The connection broke in the middle of the answer.");
  }
}

async function request(path, body, { signal, asks = true } = {}) {
  const headers = {};
  if (body) headers["content-type"] = "application/json";
  const used = key.get();
  if (used) headers.authorization = `Bearer ${used}`;
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server does not answer. Is it running?");
  }
  if (response.ok) return response;
  const error = await refusal(response);
  if (error.status === 401 && asks) {
    // Somebody may have typed a key while this request was on its way.
    const why = used ? "The server does not know this key." : "This server asks for one.";
    if (key.get() !== used || (await keyNeeded(why))) return request(path, body, { signal });
  }
  throw error;
}

async function refusal(response) {
  const text = await response.text();
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // A proxy in between may send HTML.
  }
  const message = error.message ?? `The server answered ${response.status}.`;
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  return new ApiError(message, { status: response.status, code: error.code, retryAfter });
}
