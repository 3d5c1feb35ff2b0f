"""Run models under Docker Compose, vLLM and Kubernetes: a module for each of them."""
