/* SPDX-License-Identifier: MIT */
/*
 * The verdict on a source whose counts may not come in time (docs/decisions/0010-low-latency.md):
 * blocks of one receiving kernel, which all need to agree whether the counts hold, and a source that
 * may send them at any moment or never. scripts/model.sh runs it, and variants that must fail.
 */
#ifndef BLOCKS
#define BLOCKS 3
#endif

mtype = { none, pending, present, gone };
mtype verdict = none;
bool claimed, counts;
byte took, left; /* blocks that rely on the counts, and that go on without */

#define AGREED (took == 0 || left == 0)

inline follow() { /* whoever did not decide */
    if
    :: atomic { verdict == present -> took++ }
    :: atomic { verdict == gone -> left++ }
    fi
}

inline decide() {
    if
    :: atomic { !claimed -> claimed = true };
#ifndef NO_PENDING
       verdict = pending;
#endif
#ifdef NO_SECOND_LOOK
       verdict = gone;
#else
       here = counts; /* the second look */
       if
       :: here -> verdict = present
       :: else -> verdict = gone
       fi;
#endif
       follow()
    :: atomic { claimed -> skip }; follow()
    fi
}

proctype block() {
    bool here;
    mtype seen;
    if
#ifdef VERDICT_FIRST /* looked at before the counts are */
    :: true -> seen = verdict; here = counts
#else
    :: true -> here = counts; seen = verdict
#endif
    fi;
    if
    :: here && seen == none -> took++
    :: here && seen != none -> follow()
    :: !here -> decide() /* the deadline */
    fi;
    assert(AGREED)
}

proctype source() {
    if
    :: counts = true
    :: skip
    fi
}

init {
    atomic {
        byte b = 0;
        do
        :: b < BLOCKS -> run block(); b++
        :: else -> break
        od;
        run source()
    }
}
