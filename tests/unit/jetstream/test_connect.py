"""Which servers are known, in which order they are tried, and what is demanded of those that others name."""

from __future__ import annotations

from outbox.jetstream.connect import Server, Servers

CLUSTER = {"connect_urls": ["10.0.0.7:4222", "[fd00::7]:4222", "other.example:4333", "10.0.0.1:4222", "odd:port"]}


def found(servers: Servers) -> dict[str, Server]:
    return {each.where: each for each in servers.in_order()}


def test_named_servers_come_behind_and_are_held_to_what_the_one_was_that_named_them() -> None:
    servers = Servers(["nats://user:secret@one.example:4222", "nats://10.0.0.1:4222"])
    by = found(servers)["one.example:4222"]
    servers.hear(by, CLUSTER, secured=True)
    assert {each.where for each in servers.in_order()[:2]} == {"one.example:4222", "10.0.0.1:4222"}
    named = {where: each for where, each in found(servers).items() if not servers.is_given(each)}
    assert {where: each.name for where, each in named.items()} == {
        "10.0.0.7:4222": "one.example",
        "[fd00::7]:4222": "one.example",
        "other.example:4333": "other.example",
    }
    assert all(each.secure and each.credentials == by.credentials for each in named.values())


def test_server_that_is_about_to_stop_comes_last_until_it_lets_us_in_again() -> None:
    servers = Servers(["nats://one.example:4222"])
    (one,) = servers.in_order()
    servers.hear(one, {**CLUSTER, "ldm": True}, secured=False)
    assert servers.in_order()[-1] == one
    servers.reached(one)
    assert servers.in_order()[0] == one


def test_one_place_may_have_several_users() -> None:
    servers = Servers(["nats://a:1@one.example:4222", "nats://b:2@one.example:4222"])
    assert {each.user for each in servers.in_order()} == {"a", "b"}
