"""A memory in a Milvus vector database: embedded in this process (Milvus Lite), or a cluster that many machines share.

    settings.py    where it is, how patiently it is used, who may use it
    connection.py  calls to the server, repeated while it is away; every error of it as one line
    collection.py  the entries as rows of a collection: made, checked, written and searched
    rows.py        an entry as a row, and a row as an entry
    writer.py      writes in batches, from a thread of their own
    store.py       the store: what was written and what is about to be, searched as one
    memory.py      the stream's own memory, whose search can run while the model computes the next chunk

An entry is found from the moment it is added: until the server has acknowledged it, it is searched here. What is found
therefore depends neither on when batches are sent nor on how long the server takes.
"""
