"""The notebook of examples as a page of the site, executed each time the site is built.

MkDocs calls `on_files` (mkdocs.yml, `hooks`). The repository keeps the notebook without outputs. A
cell that fails ends the build.
"""

import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' event: add the page."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    files.append(File.generated(config, "tutorial/notebook.md", content=to_markdown(execute())))
    return files


def execute(path: Path = NOTEBOOK) -> dict[str, Any]:
    """The notebook with the outputs of its cells.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat  # pyright: ignore[reportMissingImports]
    from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]
    from traitlets.config import Config  # pyright: ignore[reportMissingImports]

    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parents[1])}}
    sockets = Config({"KernelManager": {"transport": "ipc"}})  # not ports, which anybody could read
    client = NotebookClient(notebook, timeout=600, resources=folder, config=sockets)
    client.execute()
    return json.loads(nbformat.writes(notebook))


def to_markdown(notebook: dict[str, Any]) -> str:
    """Texts as they are; code, and below it what it printed or returned, in blocks."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join(_text(output) for output in cell.get("outputs", ())).rstrip()
        if printed:
            parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


def _text(output: dict[str, Any]) -> str:
    """What an output says on paper; warnings and bars on standard error are left out."""
    if output["output_type"] == "stream":
        return "".join(output["text"]) if output["name"] == "stdout" else ""
    return "".join(output.get("data", {}).get("text/plain", ""))
