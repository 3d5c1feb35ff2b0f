"""The HTTP APIs of a model server: OpenAI, Anthropic, Ollama, Docker Model Runner, chat page.

Read `app` first: it builds the application of all routes.
"""
