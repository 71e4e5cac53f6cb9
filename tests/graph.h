/* SPDX-License-Identifier: MIT */
/*
 * CUDA graphs for tests: what src/cu does not use of the driver. A graph belongs to one thread, which is
 * in the context of the device (epi_cu_enter).
 */
#ifndef TESTS_GRAPH_H
#define TESTS_GRAPH_H

#include "tests/world.h"

struct graph {
    void *graph, *exec;
};

/* Between the two what this thread queues on the stream is captured. False: the driver refused, and
 * the rank's check has failed. */
bool graph_begin(struct world *w, void *stream);
bool graph_end(struct world *w, void *stream, struct graph *g);
bool graph_launch(struct world *w, const struct graph *g, void *stream);
/* Also of a graph that was not made. */
void graph_destroy(struct world *w, struct graph *g);

#endif
