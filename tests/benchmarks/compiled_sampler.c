/* The floor of sampling.py: uniform neighbour sampling without replacement, compiled, on one core.

   The loop is that of torch-sparse's and pyg-lib's neighbor_sample (PyG, MIT): for each node not yet visited, Floyd's
   draw; a hash table gives nodes local numbers. Both of theirs are kinder to us than this: torch-sparse makes a tensor
   for every random number and a std::unordered_set for every node, pyg-lib keeps more than it needs for one edge type.

       cc -O3 -march=native -shared -fPIC tests/benchmarks/compiled_sampler.c -o compiled_sampler.so
*/

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t *keys, *values; /* open addressing, linear probing; -1 is free */
    int64_t mask;
} Table;

static uint64_t state;

static inline uint64_t next(void) { /* xorshift64* (Vigna 2016) */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717ULL;
}

static inline int64_t below(int64_t limit) { return (int64_t)(((__uint128_t)next() * (uint64_t)limit) >> 64); }

static inline int64_t place_of(Table *table, int64_t key, int64_t fresh) {
    uint64_t at = ((uint64_t)key * 11400714819323198485ULL >> 20) & table->mask;
    while (table->keys[at] >= 0 && table->keys[at] != key) at = (at + 1) & table->mask;
    if (table->keys[at] < 0) {
        table->keys[at] = key;
        table->values[at] = fresh;
    }
    return table->values[at];
}

/* Draws `hops` hops of fan-outs around `seeds` (distinct). nodes, rows, cols and edges have room for whatever may come
   of it, as the caller must know. Returns the number of edges, the number of nodes in *num_nodes. */
int64_t sample(const int64_t *offsets, const int64_t *sources, const int64_t *seeds, int64_t num_seeds,
               const int64_t *fanouts, int64_t hops, uint64_t seed, int64_t *nodes, int64_t *rows, int64_t *cols,
               int64_t *edges, int64_t room, int64_t *num_nodes) {
    Table table;
    int64_t size = 1, count = 0, known = num_seeds, begin = 0;
    while (size < 2 * room) size *= 2;
    table.mask = size - 1;
    table.keys = malloc(size * sizeof(int64_t));
    table.values = malloc(size * sizeof(int64_t));
    memset(table.keys, 0xff, size * sizeof(int64_t));
    state = seed | 1;
    for (int64_t i = 0; i < num_seeds; i++) {
        nodes[i] = seeds[i];
        place_of(&table, seeds[i], i);
    }
    for (int64_t hop = 0; hop < hops; hop++) {
        int64_t fanout = fanouts[hop], end = known;
        for (int64_t i = begin; i < end; i++) {
            int64_t start = offsets[nodes[i]], degree = offsets[nodes[i] + 1] - start;
            int64_t wanted = degree < fanout ? degree : fanout, picks[64];
            for (int64_t j = 0; j < wanted; j++) {
                int64_t pick = j;
                if (degree > fanout) {
                    pick = below(degree - fanout + j + 1);
                    for (int64_t k = 0; k < j; k++)
                        if (picks[k] == pick) {
                            pick = degree - fanout + j;
                            break;
                        }
                    picks[j] = pick;
                }
                int64_t source = sources[start + pick], local = place_of(&table, source, known);
                if (local == known) nodes[known++] = source;
                rows[count] = local;
                cols[count] = i;
                edges[count++] = start + pick;
            }
        }
        begin = end;
    }
    free(table.keys);
    free(table.values);
    *num_nodes = known;
    return count;
}
