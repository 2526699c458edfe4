"""Writing shards: a corpus becomes tars with an index; parallel, resumable, the same bytes for any worker count."""
