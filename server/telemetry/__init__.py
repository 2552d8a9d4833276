"""What is seen from outside: spans by OTLP, Prometheus metrics, logs that carry ids.

Parts tell what happens through `watch`, and know nothing of what becomes of it. `spans`, `export`,
`tools` and `callers` import OpenTelemetry; nothing imports them while no endpoint is set.
"""
