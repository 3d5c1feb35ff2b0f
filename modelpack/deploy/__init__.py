"""Where models run: beside Docker Compose, under vLLM, in Kubernetes."""
