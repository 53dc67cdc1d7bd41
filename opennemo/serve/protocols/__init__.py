"""What clients speak: OpenAI, Mistral, Anthropic and NVIDIA NIM."""
