"""A recipe is strict: unknown keys are refused, by name."""

from pathlib import Path

import pytest

from opennemo.errors import InvalidRequest
from opennemo.files import read_json
from opennemo.train.config import differences, parse_recipe, read_recipe, to_json

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = """
steps = 10
model = { shape = "tiny", tokenizer = "somewhere" }
data = { train = [{ path = "shards" }] }
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return path

    return write


def test_defaults_overrides_and_a_round_trip(write, tmp_path):
    recipe = read_recipe(write(MINIMAL), ["optim.lr=1e-4", "model.tokenizer=a/b", "qat.kv=true"])
    assert recipe.optim.lr == 1e-4 and recipe.model.tokenizer == "a/b"
    assert recipe.qat is not None and recipe.qat.kv and recipe.qat.format == "fp8-static"
    saved = tmp_path / "recipe.json"
    saved.write_text(to_json(recipe))
    again = parse_recipe(read_json(saved), "saved")
    assert again == recipe and differences(recipe, again) == []
    other = read_recipe(write(MINIMAL), ["optim.lr=2e-4"])
    assert "optim.lr was 0.0001 and is 0.0002" in differences(recipe, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim = { learning_rate = 1.0 }", "optim.learning_rate is not a setting"),
        ("stepz = 1", "stepz is not a setting; did you mean steps?"),
        ("optim = { weigth_decay = 0.1 }", "did you mean optim.weight_decay?"),
        ("windows = 7", "windows is not a setting; did you mean data.window?"),
        ("lora = { rnk = 4 }", "lora.rnk is not a setting; did you mean lora.rank?"),
        ('optim = { lr = "fast" }', "optim.lr is 'fast': Input should be a valid number"),
        ("optim = { lr = -1.0 }", "optim.lr is -1.0: Input should be greater than 0"),
        ("seed = true", "seed is True: Input should be a valid integer"),
        (
            "qat = { format = 'fp7' }",
            "qat.format is 'fp7': allowed are fp8, fp8-static, int8",
        ),
        ("lora = { rank = 4 }", "lora adapts a model that is there: give model.path"),
        ("objective = 'next'", "objective is 'next'"),
        ("[", "not TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(write, change, message):
    with pytest.raises(InvalidRequest) as error:
        read_recipe(write(MINIMAL + change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_named(write):
    with pytest.raises(
        InvalidRequest, match=r"steps is missing; model is missing; data is missing"
    ):
        read_recipe(write(""))
    with pytest.raises(InvalidRequest, match="No such file"):
        read_recipe(Path("nowhere.toml"))
    with pytest.raises(InvalidRequest, match=r"model\.path or model\.shape"):
        read_recipe(write(MINIMAL.replace('shape = "tiny", ', "")))
    with pytest.raises(InvalidRequest, match="key=value"):
        read_recipe(write(MINIMAL), ["optim.lr"])
    with pytest.raises(InvalidRequest, match="not a multiple"):
        read_recipe(write(MINIMAL), ["data.rows=6", "data.micro_rows=4"])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_project_is_valid(path):
    if "tekken" in path.stem:  # settings of vocabularies
        return
    assert read_recipe(path, ["model.tokenizer=x"]).steps > 0
