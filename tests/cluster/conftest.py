from tests.serve.conftest import folder, running, state_dir, tiny_llm  # noqa: F401  fixtures
