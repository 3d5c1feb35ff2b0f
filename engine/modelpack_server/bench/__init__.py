"""`modelpack bench`: loads for servers of the OpenAI API, and reports of how they bear them.

`words` and `server` speak to a server, `load` runs one workload, `plan` says which, `benchmark`
runs them all; `child` starts a server of ours; `machine`, `tables` and `chart` make the report.
"""
