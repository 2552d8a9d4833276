"""What is seen from outside: spans by OTLP, Prometheus metrics, logs that carry ids.

Parts tell what happens through `watch`, and know nothing of what becomes of it. OpenTelemetry is
imported by `spans`, `export` and `tools` alone, which nothing imports while no endpoint is set.
"""
