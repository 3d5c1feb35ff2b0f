"""Models on this machine: an OCI image layout, Docker Model Runner's own store, and memory."""
