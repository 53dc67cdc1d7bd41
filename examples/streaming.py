"""Print an answer as it comes, stop it, and watch two at once: python examples/streaming.py"""

import asyncio

from opennemo import LLM, Reply


async def show(name: str, reply: Reply) -> None:
    """Tokens of one answer, without blocking the others."""
    async for tokens in reply.tokens():
        for token in tokens:
            print(f"{name}: {token.text!r}")


async def side_by_side(llm: LLM) -> None:
    replies = [llm.complete(start, max_tokens=8) for start in ("One, two,", "Red, green,")]
    await asyncio.gather(*(show(name, reply) for name, reply in zip("AB", replies, strict=True)))


with LLM.load("smollm2-135m-instruct") as llm:
    story = llm.chat([{"role": "user", "content": "Tell me a story about the sea."}])
    for n, piece in enumerate(story):
        print(piece, end="", flush=True)
        if n == 30:
            story.cancel()  # the engine stops at its next step
    print(f" ... ({story.finish_reason})\n")

    asyncio.run(side_by_side(llm))
