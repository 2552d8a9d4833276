"""The schema's history, run by `feedback.database.migrate`. One history for the whole database:
the tables of `policy.releases` are here too."""
