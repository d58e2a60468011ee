"""
Clients of redis-py from URLs, whose forms `shmstore.redis.RedisStore.from_url` documents.
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
from shmstore.redis.pool import Pool
from shmstore.urls import NETWORK, safe, suggestion

__all__ = ["PREFIX", "Address", "check_prefix", "where"]

PREFIX: Final = "shmstore:"
_PLAIN: Final = {"valkey": "redis", "valkeys": "rediss", "redis+unix": "unix", "valkey+unix": "unix"}
_HOST: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:,/]+)(?::(\d{1,5}))?")
_NODES_TRIED: Final = 3  # attempts of a call to a Cluster during a failover


def check_prefix(prefix: object) -> None:
    """
    Refuse an invalid prefix.

    Raises:
        ConfigError: It is not 1 to 64 printable ASCII characters without braces, which have a meaning in a Cluster.
    """
    if not isinstance(prefix, str) or not re.fullmatch(r"[!-z|~]{1,64}", prefix, re.ASCII):
        raise ConfigError(f"prefix must be 1 to 64 printable ASCII characters without spaces or braces, not {prefix!r}")


@dataclass(frozen=True)
class Address:
    """
    The address of the server, or of a Cluster.

    Attributes:
        cluster: Whether it is a Cluster.
        prefix: The prefix of the keys.
        where: A description of the server for messages, without the password.
    """

    cluster: bool
    prefix: str
    where: str
    _kind: str
    _nodes: list[tuple[str, int]]
    _name: str  # of the primary, with Sentinel
    _settings: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, url: str, *, prefix: str = PREFIX) -> Address:
        """
        Parse a URL.

        Args:
            url: The URL.
            prefix: The prefix of the keys if the URL has none.

        Raises:
            ConfigError: The URL has another form.
        """
        scheme = url.partition("://")[0].lower()
        base, _, kind = _PLAIN.get(scheme, scheme).partition("+")
        if scheme not in NETWORK:
            raise ConfigError(f"{safe(url)} is not the URL of a Redis or Valkey server{suggestion(url)}")
        try:
            parts = urlsplit(url)
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            prefix = query.pop("prefix", prefix)
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
            redis.ConnectionPool(**settings).make_connection()  # checks the query; connects only when it is used
        except ConfigError as exc:
            raise ConfigError(f"{safe(url)}: {exc}") from None
        except (ValueError, TypeError) as exc:
            # If a password contains a /, a part of it is taken for the port and quoted in the error.
            why = re.sub(r" as '.*'$|: '.*'$", "", str(exc), flags=re.DOTALL) if "@" in url else exc
            raise ConfigError(f"{safe(url)} is not the URL of a Redis or Valkey server: {why}") from None
        if nodes:
            settings.pop("host", None)
            settings.pop("port", None)
        shown = ",".join(f"{host}:{port}" for host, port in nodes) or _shown(settings)
        return cls(kind == "cluster", prefix, f"{_NAMES.get(kind, 'Redis')} at {shown}", kind, nodes, name, settings)

    def open(self, timeout: float) -> Any:
        """Return a client that waits ``timeout`` seconds for an answer and does not retry by itself."""
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
        return redis.Redis(connection_pool=Pool(**settings))


_NAMES: Final = {"cluster": "the Redis Cluster", "sentinel": "the Redis of the Sentinels"}


def where(client: Any) -> str:
    """Return a description of a client's server for messages, without the password."""
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
        raise ConfigError("special characters in a user or password must be escaped: %3F for ?, %23 for #, %2F for /")
    if "decode_responses" in query:
        raise ConfigError("omit decode_responses: a store needs bytes")


def _hosts(text: str, port: int) -> list[tuple[str, int]]:
    found = [_HOST.fullmatch(each) for each in text.split(",")]
    if not all(found):
        raise ConfigError("the host is missing or invalid: host[:port], several of them separated by commas")
    return [(each[1].strip("[]"), int(each[2] or port)) for each in found if each is not None]


def _primary(path: str) -> tuple[str, str]:
    """Return the name of the primary, and the path of the URL without it."""
    name, _, database = path.strip("/").partition("/")
    if not name:
        raise ConfigError("the name of the primary is missing: redis+sentinel://host/NAME")
    return unquote(name), f"/{database}"


def _no_database(path: str) -> str:
    if path.strip("/") not in ("", "0"):
        raise ConfigError("a Cluster has no databases: omit the number")
    return ""
