"""Texts for a model to read: prose, a conversation and a program, a few hundred tokens in all."""

from __future__ import annotations

PROSE = """The river begins as a trickle under moss, high above the last farm, and for the first
mile a child could step across it. Nobody ever agreed on which of the three springs is the true
one. The maps of the eighteenth century follow the eastern branch, because the surveyor lodged
in the eastern valley and did not care to climb; the maps of the nineteenth follow the western,
which is longer; and the people who live there call all three of them the Mother and leave it
at that. Below the farm the water gathers speed. It has cut a gorge through the limestone,
forty metres deep and in places so narrow that the sun reaches the bottom for only a few
minutes at noon. Ferns grow on the walls, and in winter the spray freezes into curtains of ice
that fall in March with a noise like cannon. A wooden bridge crosses at the narrowest point. It
was built in 1874 by a timber company, washed away in 1902, rebuilt in iron, and closed to
carts in 1951 after an inspector put his walking stick through one of the planks. Today hikers
use it, one at a time, as the sign asks them to. Where the gorge opens, the valley is wide and
flat, and the river forgets its hurry. It winds between meadows, leaves behind small lakes in
the shape of a crescent, and turns the wheels of nothing at all: the last mill closed before
the war. What it carries is gravel, silt, and in late summer the seeds of willows, white as
snow on the slow brown water. By the time it reaches the town, two hundred kilometres from the
moss, it is broad enough for barges and has a different name."""

CONVERSATION = """<|im_start|>user
What is the difference between weather and climate?<|im_end|>
<|im_start|>assistant
Weather is what the atmosphere does at a certain place and time: whether it rains this
afternoon, how strong the wind is, how warm the day becomes. Climate is the average of the
weather over many years, usually thirty, together with how much it varies. A cold winter in one
town does not change the climate, but if winters become milder decade after decade, the climate
has changed.<|im_end|>
"""

PROGRAM = '''def merge_sort(items):
    """Return a new list with the same items in ascending order."""
    if len(items) <= 1:
        return list(items)
    middle = len(items) // 2
    left = merge_sort(items[:middle])
    right = merge_sort(items[middle:])
    merged = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i])
            i += 1
        else:
            merged.append(right[j])
            j += 1
    merged.extend(left[i:])
    merged.extend(right[j:])
    return merged
'''

PASSAGES = {"prose": PROSE, "conversation": CONVERSATION, "program": PROGRAM}
