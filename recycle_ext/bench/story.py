"""The text that every runner reads: a story."""

from __future__ import annotations

from collections.abc import Sequence

STORY = """\
Once upon a time, in a small village by the sea, there lived a clockmaker named Ida. Her shop stood at the end
of the harbour wall, where the wind was strongest, and every morning she wound forty-one clocks before she lit the
stove. No two of them agreed. The fishermen used to say that if you did not like the hour, you only had to walk a
little further into the room.

One evening in November a boy came in with a box under his arm. "My grandfather said you could mend this," he said.
Inside lay a brass clock without hands, no larger than an apple. It was ticking. Ida turned it over, looked for a
keyhole and found none. "How long has it been going?" she asked.

"Always," said the boy. "But it goes faster when it rains."

She laughed, and then she put her ear to it and stopped laughing. Outside the first drops fell on the boats, and the
ticking quickened, as a heart does on a steep road. All night she sat with a lamp and her smallest tools. She opened
the case and found no spring, no wheels, only a folded map of the coast, drawn so finely that each house of the
village could be seen. In front of one of them, hers, stood a tiny door that she had never noticed.

In the morning the rain was over. Ida took her coat, went around the house to the side that faces the water, and
pushed aside the ivy. There was the door. It had no handle, but in the middle of it was a hollow, round, no larger
than an apple. She ran back for the clock, and the boy, who had slept under the counter, ran after her. When she set
it into the hollow, the ticking ceased. For the first time in forty years all the clocks in the shop struck together,
and the door swung open on a flight of steps that led down, dry and lit by lamps, far out beneath the sea.

"Shall we tell anyone?" whispered the boy.

"Later," said Ida. "First we shall see what time it is down there."

"""


def part(ids: Sequence[int], start: int, count: int) -> list[int]:
    """``count`` ids from ``start`` on; after the last id comes the first."""
    return [ids[i % len(ids)] for i in range(start, start + count)]
