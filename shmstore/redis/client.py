"""
Clients of redis-py, as URLs name them.

    redis://[[user]:password@]host[:port][/db]     rediss:// with TLS      valkey://, valkeys:// the same
    unix://[user:password@]/path/of/socket[?db=0]  redis+unix://, valkey+unix:// the same
    redis+sentinel://[user:password@]host[:26379][,host...]/name-of-the-primary[/db]     rediss+sentinel:// with TLS
    redis+cluster://[user:password@]host[:port][,host...]                                rediss+cluster:// with TLS

A query gives what redis-py takes there (``?ssl_ca_certs=/path``, ``socket_timeout=1``), and ``prefix`` of the keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from shmstore.errors import ConfigError
from shmstore.urls import NETWORK, safe, suggestion

__all__ = ["PREFIX", "Address", "check_prefix", "where"]

PREFIX: Final = "shmstore:"
_PLAIN: Final = {"valkey": "redis", "valkeys": "rediss", "redis+unix": "unix", "valkey+unix": "unix"}
_HOST: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:,/]+)(?::(\d{1,5}))?")
_NODES_TRIED: Final = 3  # a call to a Cluster that is just failing over


def check_prefix(prefix: object) -> None:
    """
    Complain of a prefix that cannot be one.

    Raises:
        ConfigError: It is not 1 to 64 printable ASCII characters without braces, which have a meaning in a Cluster.
    """
    if not isinstance(prefix, str) or not re.fullmatch(r"[!-z|~]{1,64}", prefix, re.ASCII):
        raise ConfigError(f"prefix must be 1 to 64 printable ASCII characters, no space and no brace, not {prefix!r}")


@dataclass(frozen=True)
class Address:
    """
    Where the sessions are.

    Attributes:
        cluster: Whether it is a Cluster.
        prefix: Of the keys.
        where: What to call it; no password in it.
    """

    cluster: bool
    prefix: str
    where: str
    _kind: str
    _nodes: list[tuple[str, int]]
    _name: str  # of a Sentinel's primary
    _settings: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, url: str) -> Address:
        """
        Take a URL apart.

        Raises:
            ConfigError: It is not one of those above.
        """
        scheme = url.partition("://")[0].lower()
        base, _, kind = _PLAIN.get(scheme, scheme).partition("+")
        if scheme not in NETWORK:
            raise ConfigError(f"{safe(url)} is no URL of a Redis or Valkey server{suggestion(url)}")
        try:
            parts = urlsplit(url)
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            prefix = query.pop("prefix", PREFIX)
            check_prefix(prefix)
            base = _PLAIN.get(base, base)
            user, at, hosts = parts.netloc.rpartition("@")
            nodes: list[tuple[str, int]] = []
            name, path = "", parts.path
            if kind == "sentinel":
                nodes, hosts = _hosts(hosts, 26379), "node"
                name, path = _primary(path)
            elif kind == "cluster":
                nodes, hosts = _hosts(hosts, 6379), "node"
                path = _no_database(path)
            text = f"{base}://{user}{at}{hosts}{path}" + (f"?{urlencode(query)}" if query else "")
            _check(parts, query)
            settings = dict(parse_url(text))
            redis.ConnectionPool(**settings).make_connection()  # which connects later; what the query says is looked at
        except ConfigError as exc:
            raise ConfigError(f"{safe(url)}: {exc}") from None
        except (ValueError, TypeError) as exc:
            # Of a password with a / in it a part is taken for the port, and quoted.
            why = re.sub(r" as '.*'$|: '.*'$", "", str(exc), flags=re.DOTALL) if "@" in url else exc
            raise ConfigError(f"{safe(url)} is no URL of a Redis or Valkey server: {why}") from None
        if nodes:
            settings.pop("host", None)
            settings.pop("port", None)
        shown = ",".join(f"{host}:{port}" for host, port in nodes) or _shown(settings)
        return cls(kind == "cluster", prefix, f"{_NAMES.get(kind, 'Redis')} at {shown}", kind, nodes, name, settings)

    def open(self, timeout: float) -> Any:
        """Return a client, that waits so many seconds for an answer and repeats nothing by itself."""
        never = Retry(NoBackoff(), 0)
        settings: dict[str, Any] = {
            "socket_timeout": timeout or None,
            "socket_connect_timeout": timeout or None,
            "protocol": 2,
            **self._settings,
        }
        if self._kind == "cluster":
            settings.pop("db", None)
            connection_class = settings.pop("connection_class", None)
            nodes = [ClusterNode(host, port) for host, port in self._nodes]
            return redis.RedisCluster(
                startup_nodes=nodes,
                ssl=connection_class is redis.SSLConnection,
                retry=Retry(NoBackoff(), _NODES_TRIED),
                **settings,
            )
        settings["retry"] = never
        if self._kind == "sentinel":
            secure = settings.pop("connection_class", None) is redis.SSLConnection
            shared = {key: value for key, value in settings.items() if key.startswith(("socket_", "ssl_", "protocol"))}
            sentinel = Sentinel(self._nodes, sentinel_kwargs={**shared, "ssl": secure, "retry": never}, **settings)
            return sentinel.master_for(self._name, ssl=secure)
        return redis.Redis(connection_pool=redis.ConnectionPool(**settings))


_NAMES: Final = {"cluster": "the Redis Cluster", "sentinel": "the Redis of the Sentinels"}


def where(client: Any) -> str:
    """Return what to call the server of a client; no password in it."""
    if isinstance(client, redis.RedisCluster):
        shown = ",".join(sorted(f"{node.host}:{node.port}" for node in client.get_primaries()))
        return f"the Redis Cluster at {shown}"
    return f"Redis at {_shown(client.get_connection_kwargs())}"


def _shown(settings: dict[str, Any]) -> str:
    if "path" in settings:
        return str(settings["path"])
    return f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}"


def _check(parts: SplitResult, query: dict[str, str]) -> None:
    if parts.fragment or "@" in parts.path + parts.query:
        raise ConfigError("what is special in a user or a password must be escaped: %3F for ?, %23 for #, %2F for /")
    if "decode_responses" in query:
        raise ConfigError("leave out decode_responses: a store needs bytes")


def _hosts(text: str, port: int) -> list[tuple[str, int]]:
    found = [_HOST.fullmatch(each) for each in text.split(",")]
    if not all(found):
        raise ConfigError("it must say where: host[:port], more than one with commas between them")
    return [(each[1].strip("[]"), int(each[2] or port)) for each in found if each is not None]


def _primary(path: str) -> tuple[str, str]:
    """Return the name of the primary, and the path of a URL without it."""
    name, _, database = path.strip("/").partition("/")
    if not name:
        raise ConfigError("it does not say the name of the primary: redis+sentinel://host/NAME")
    return unquote(name), f"/{database}"


def _no_database(path: str) -> str:
    if path.strip("/") not in ("", "0"):
        raise ConfigError("a Cluster has no databases")
    return ""
