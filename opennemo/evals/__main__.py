"""lm-evaluation-harness's own command line with our engine in it, as `--model opennemo`.

python -m opennemo.evals run --model opennemo --model_args pretrained=MODEL --tasks hellaswag
"""

from lm_eval.__main__ import cli_evaluate

import opennemo.evals.harness  # noqa: F401  registers the model

if __name__ == "__main__":
    cli_evaluate()
