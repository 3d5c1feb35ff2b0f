"""Run models under Docker Compose, vLLM and Kubernetes; one module for each."""
