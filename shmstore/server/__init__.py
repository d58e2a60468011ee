"""The process that owns a store, and its clients. Private: `shmstore` exports what is public."""
