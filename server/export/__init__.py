"""The record in files: what a row says, and how it is written down. Reading it is
`feedback.export`'s, and docs/export.md tells people what they find.
"""
