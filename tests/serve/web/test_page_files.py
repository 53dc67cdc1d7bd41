"""Files that people attach on the chat page, and formulas in answers."""

import re
import zlib

import pytest

expect = pytest.importorskip("playwright.sync_api").expect
LATIN = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
# A font that is not in the file, whose characters only a table of Adobe's names.
JAPANESE = """<< /Type /Font /Subtype /Type0 /BaseFont /Gothic /Encoding /90ms-RKSJ-H
/DescendantFonts [ << /Type /Font /Subtype /CIDFontType0 /BaseFont /Gothic
/FontDescriptor << /Type /FontDescriptor /FontName /Gothic /Flags 4
/ItalicAngle 0 /Ascent 859 /Descent -140 /StemV 80 /CapHeight 700
/FontBBox [0 0 1000 1000] >>
/CIDSystemInfo << /Registry (Adobe) /Ordering (Japan1) /Supplement 2 >> >> ] >>"""


def make_pdf(*pages: bytes, font: str = LATIN) -> bytes:
    """A PDF with one line on each page; each is given in the bytes of the font's encoding."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        font.encode(),
    ]
    for i, line in enumerate(pages):
        words = f"BT /F 12 Tf 72 700 Td <{line.hex()}> Tj ET" if line else ""
        drawn = zlib.compress(words.encode())
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R "
            "/Resources << /Font << /F 3 0 R >> >> >>".encode(),
            f"<< /Length {len(drawn)} /Filter /FlateDecode >> stream\n".encode()
            + drawn + b"\nendstream",
        ]  # fmt: skip
    out, places = bytearray(b"%PDF-1.5\n"), []
    for number, each in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n".encode() + each + b"\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    n, at = len(objects) + 1, len(out)
    out += (
        f"xref\n0 {n}\n0000000000 65535 f \n{table}trailer << /Size {n} /Root 1 0 R >>\n".encode()
    )
    return bytes(out + f"startxref\n{at}\n%%EOF".encode())


def attach(page, name: str, content: bytes) -> None:
    kind = "application/octet-stream"
    page.set_input_files("#attachment", {"name": name, "mimeType": kind, "buffer": content})


def test_texts_go_with_a_message(chat):
    page = chat.open().page
    text = "Flour, eggs\r\nand <b>milk</b>."
    attach(page, 'a "list".txt', text.encode())
    attach(page, "wide.csv", "Größe;é".encode("utf-16"))
    chips = page.locator("#attached li")
    expect(chips).to_have_text([re.compile("28 characters"), re.compile("wide.csv")])
    expect(page.locator("#context .text")).to_have_text(re.compile(r"^\d{3,} / 4,096$"))
    expect(page.locator("#send")).to_be_enabled()
    page.get_by_label("Remove wide.csv").click()
    attach(page, "wide.csv", "Größe;é".encode("utf-16"))
    expect(chips).to_have_count(2)
    page.click("#new")  # what is written and attached waits with its conversation
    chat.ask("What do I need?", "Eggs")
    sent = chat.bodies[-1]["messages"][0]["content"]
    assert sent == (
        '<file name="a list .txt">\nFlour, eggs\nand <b>milk</b>.\n</file>\n\n'
        '<file name="wide.csv">\nGröße;é\n</file>\n\nWhat do I need?'
    )
    expect(chips).to_have_count(0)
    files = page.locator(".user details")
    expect(files.locator("summary").first).to_have_text('a "list".txt 28 characters')
    files.first.locator("summary").click()
    expect(files.first.locator("code")).to_have_text("Flour, eggs\nand <b>milk</b>.")
    expect(page.locator("#title")).to_have_text("What do I need?")
    page.wait_for_timeout(500)
    page.reload()
    expect(files).to_have_count(2)
    page.locator(".user").hover()
    page.get_by_label("Edit").first.click()
    page.get_by_label("Edit the message").fill("And now?")
    chat.extra = {"structured_outputs": {"choice": ["Milk"]}}
    page.keyboard.press("Enter")
    chat.wait()
    assert chat.bodies[-1]["messages"][0]["content"].endswith("</file>\n\nAnd now?")


def test_files_are_dropped_and_may_go_alone(chat):
    page = chat.open().page
    page.evaluate(
        """() => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File(["some notes"], "notes.md"));
            const event = { dataTransfer, bubbles: true, cancelable: true };
            document.querySelector("main").dispatchEvent(new DragEvent("drop", event));
        }"""
    )
    expect(page.locator("#attached li")).to_have_count(1)
    page.locator("#draft").press("Enter")
    chat.wait()
    assert (
        chat.bodies[-1]["messages"][0]["content"] == '<file name="notes.md">\nsome notes\n</file>'
    )
    expect(page.locator("#title")).to_have_text("notes.md")


def test_what_is_no_text_is_refused_by_name(chat):
    page = chat.open().page
    toast = page.locator("#toast")
    for name, content, why in (
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "neither text in UTF-8 nor a PDF"),
        ("b.bin", b"a\0b", "neither text in UTF-8 nor a PDF"),
        ("c.txt", b" \n", "is empty"),
        ("d.txt", b"x" * 4_000_001, "4,000,001 characters are too many"),
    ):
        attach(page, name, content)
        expect(toast).to_have_text(f"{name}: {why}")
    expect(page.locator("#attached li")).to_have_count(0)
    expect(page.locator("#send")).to_be_disabled()


@pytest.mark.usefixtures("libraries")
def test_a_pdf_gives_the_words_of_its_pages(chat):
    page = chat.open().page
    scripts: list[str] = []
    page.context.on("request", lambda request: scripts.append(request.url))
    attach(page, "a.pdf", make_pdf(b"The first page.", b"The second one."))
    expect(page.locator("#attached small")).to_have_text("32 characters")
    assert any("pdf.worker" in url for url in scripts)
    attach(page, "b.pdf", make_pdf("日本語の文書".encode("cp932"), font=JAPANESE))
    expect(page.locator("#attached small").last).to_have_text("6 characters")
    chat.ask("Read them.", "Yes")
    assert chat.bodies[-1]["messages"][0]["content"] == (
        '<file name="a.pdf">\nThe first page.\n\nThe second one.\n</file>\n\n'
        '<file name="b.pdf">\n日本語の文書\n</file>\n\nRead them.'
    )
    toast = page.locator("#toast")
    attach(page, "scan.pdf", make_pdf(b"", b""))
    expect(toast).to_have_text("scan.pdf: has no text; its pages may be pictures")
    attach(page, "torn.pdf", make_pdf(b"The first page.")[:200])
    expect(toast).to_contain_text("torn.pdf: this PDF cannot be read")
    expect(page.locator("#attached li")).to_have_count(0)


@pytest.mark.usefixtures("libraries")
def test_formulas_are_set_by_katex(chat):
    page = chat.open().page
    chat.ask(
        "Hi",
        "Energy is $E = mc^2$, or \\(\\frac{a}{b}\\); it costs $5 or $10, `$x$` is code.\n\n"
        "$$\n\\sum_{i=1}^n i\n$$\n\nand \\[ x \\]\n\n$\\href{javascript:1}{x}$ $\\nonsense$ "
        "$<img src=x onerror=pwned=1>$",
    )
    answer = page.locator(".assistant .markdown")
    expect(answer.locator(".math .katex")).to_have_count(5)
    expect(answer.locator(".math-display .katex-display")).to_have_count(2)
    expect(answer.locator("mfrac")).to_have_count(1)
    expect(answer.locator("p").first).to_contain_text("it costs $5 or $10, $x$ is code.")
    expect(answer.locator(".katex-html", has_text="nonsense")).to_have_count(1)
    assert answer.locator("a, img").count() == 0
    page.wait_for_function("[...document.fonts].some((font) => font.status === 'loaded')")
    size = answer.locator(".math .katex-html").first.evaluate(
        "e => e.getBoundingClientRect().width"
    )
    assert 20 < size < 200
