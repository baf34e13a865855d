"""Index expressions and proofs about attention masks; nothing here knows of caches or of rewriting graphs."""
