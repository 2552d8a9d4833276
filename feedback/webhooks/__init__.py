"""Outcomes that other services send by themselves: who signed them, and what they say.

Knows nothing of HTTP: functions take headers, a body and a clock, and return values or typed
refusals. `server.routes.webhooks` answers, `feedback.log` records.
"""
