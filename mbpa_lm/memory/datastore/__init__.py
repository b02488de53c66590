"""A memory on disk: millions of entries in memory-mapped files with an index over their keys.

    FOLDER/manifest.json             what it is: model, tokenizer, layout, counts, checksums, the index (manifest.py)
    FOLDER/keys.bin, values.bin ...  one file a column, one row an entry, only ever appended to (entry_files.py)
    FOLDER/index-1.faiss           over the entries there were (index.py); what came later is searched exactly

Bytes of an entry are written and synced before the manifest that counts them is: whatever happens in between, every entry
that was acknowledged is whole, and what was not is ignored. Nothing in the folder executes when it is read.
"""
