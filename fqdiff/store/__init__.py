"""The artifact store: ids, atomic commit, verification, lineage, and the only code that opens a path."""
