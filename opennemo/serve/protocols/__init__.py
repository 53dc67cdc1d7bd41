"""The protocols of clients: OpenAI's, Mistral's, Anthropic's and NVIDIA NIM's."""
