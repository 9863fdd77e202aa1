"""`outbox bench`: how fast the relay is on given servers or embedded ones, next to what the two servers allow.

Each case is measured in rounds, and what is compared is measured in the same round. Nothing here is loaded by the
relay or by an application.
"""
