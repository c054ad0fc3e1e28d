"""OpenAI's HTTP API over `AsyncLLM` (extra `serve`).

process (signals) · app (routes) → guard (key, counts), events (streams) → service (a job on the
engine) → answers (JSON out), body (JSON in) → job → fields
"""
