"""The contract, on a single server and on a Cluster of three."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from redis_servers import RedisCluster, RedisServer

from shmstore import RedisStore
from shmstore.redis.client import Address
from shmstore.testing import StoreContract

_numbers = itertools.count()


class TestRedisStore(StoreContract):
    @pytest.fixture(autouse=True)
    def server(self, redis_server: RedisServer) -> None:
        self.url = redis_server.url

    def make_store(self, **options: Any) -> RedisStore:
        return RedisStore.from_url(f"{self.url}?prefix=t{next(_numbers)}:", **options)


@pytest.fixture(scope="session")
def cluster_client(redis_cluster: RedisCluster) -> Iterator[Any]:
    """Return a client for all stores: each new one loads the commands and the slots of the Cluster."""
    client = Address.of(redis_cluster.url).open(timeout=2.0)
    yield client
    client.close()


class TestRedisStoreInACluster(StoreContract):
    @pytest.fixture(autouse=True)
    def server(self, cluster_client: Any) -> None:
        self.client = cluster_client

    def make_store(self, **options: Any) -> RedisStore:
        return RedisStore(self.client, prefix=f"t{next(_numbers)}:", **options)
