"""What listens to the relay and shows it: logs, metrics, health over HTTP, systemd; and looks at the database for them.

Knows what happened as telemetry tells it. Must not be in the relay's way: what fails here never ends a term.
"""
