"""`modelpack bench`: run workloads against servers of the OpenAI API and report their latencies.

`workloads` defines the requests, `server` sends them, `benchmark` runs the steps of a plan,
`report` computes latencies and rates, and `tables` shows them. `engine_load` runs a workload on an
engine in this process.
"""
