"""The contract, on a single server and on a Cluster of three."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from redis_servers import RedisCluster, RedisServer

from shmstore import RedisStore
from shmstore.testing import StoreContract

_numbers = itertools.count()


class TestRedisStore(StoreContract):
    @pytest.fixture(autouse=True)
    def server(self, redis_server: RedisServer) -> None:
        self.url = redis_server.url

    def make_store(self, **options: Any) -> RedisStore:
        return RedisStore.from_url(f"{self.url}?prefix=t{next(_numbers)}:", **options)


class TestRedisStoreInACluster(StoreContract):
    @pytest.fixture(autouse=True)
    def server(self, redis_cluster: RedisCluster) -> None:
        self.url = redis_cluster.url

    def make_store(self, **options: Any) -> RedisStore:
        return RedisStore.from_url(f"{self.url}?prefix=t{next(_numbers)}:", **options)
