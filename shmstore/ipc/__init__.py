"""What the server of a store and its clients share: the files of the store, the messages, the credentials. Private."""
