"""The process that owns a store. Private: `shmstore` exports what is public."""
