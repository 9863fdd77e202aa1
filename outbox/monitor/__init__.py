"""What listens to the relay and shows it: logs, metrics, health over HTTP, systemd; and looks at the database for them.

Knows what happened as telemetry tells it, and what the observer asks the database, with its own statements. Must not
know the relay's parts, nor be in its way: what fails here never ends a term.
"""
