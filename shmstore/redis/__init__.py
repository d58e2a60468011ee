"""The store for several hosts: its sessions are on a Redis or Valkey server, with or without Sentinel, or a Cluster."""

from __future__ import annotations

try:
    import redis  # noqa: F401
except ImportError as exc:
    raise ImportError("RedisStore needs the package redis: pip install 'shmstore[redis]'") from exc

from shmstore.redis.store import RedisStore

__all__ = ["RedisStore"]
