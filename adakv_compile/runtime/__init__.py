"""What a conversation holds at run time: the store of a layer, its two tensor views, and the call boundary."""
