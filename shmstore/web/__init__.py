"""Private: what the sessions of all frameworks share. `shmstore.session` is their public base."""
