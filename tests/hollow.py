"""Models of any size for arithmetic: folders whose weights are only declared."""

import json
import math
from pathlib import Path

from opennemo.model import layouts
from opennemo.model.checkpoint import weight_shapes
from opennemo.model.transformer import ModelConfig


def write_hollow(folder: Path, config: ModelConfig) -> Path:
    """A folder in bf16 whose file is as large as it should be, and takes no room on the disk."""
    header, end = {}, 0
    for name, shape in weight_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(layouts.write_settings(config, "mistral")))
    with (folder / "consolidated.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder
