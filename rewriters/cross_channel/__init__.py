"""Take cross-channel statistics (norms) over the live channels only, while gates train."""

from rewriters.cross_channel.installing import (
    StatisticSite,
    find_statistics,
    gather_statistics,
    install_live_statistics,
    plain_statistics,
    remove_live_statistics,
    take_alike,
    write_live,
)

__all__ = [
    "StatisticSite",
    "find_statistics",
    "gather_statistics",
    "install_live_statistics",
    "plain_statistics",
    "remove_live_statistics",
    "take_alike",
    "write_live",
]
