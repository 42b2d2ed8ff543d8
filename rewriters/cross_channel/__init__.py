"""Take statistics across channels (norms) over the live channels alone, for as long as gates train."""

from rewriters.cross_channel.placement import Site, place, plain_statistics, site, statistics, take_off, write_live

__all__ = [
    "Site",
    "place",
    "plain_statistics",
    "site",
    "statistics",
    "take_off",
    "write_live",
]
