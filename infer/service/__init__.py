"""``catinfer serve``: images over HTTP, and the page of ``catexport --web``. Needs the extra ``serve``."""
