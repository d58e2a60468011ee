"""The store over an arena of this process. Private: `shmstore` exports what is public."""
