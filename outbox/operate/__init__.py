"""What operators do by command, a room for each: status, show, dead, replay, pause, purge, verify, rebase, migrate.

Knows the database's tables, and a stream's messages where a command compares the two; each works without a relay. Must
not know the terminal, and must not publish: what is to be sent goes through the leader.
"""
