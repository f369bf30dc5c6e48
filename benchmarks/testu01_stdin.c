/* TestU01's batteries on the 32-bit words of standard input.

       cc -O2 benchmarks/testu01_stdin.c -o testu01_stdin -ltestu01 -lprobdist -lmylib -lm
       python benchmarks/stream.py rows | ./testu01_stdin SmallCrush
       python benchmarks/stream.py rows | ./testu01_stdin SmallCrush reversed
       python benchmarks/stream.py rows | ./testu01_stdin BigCrush 1 13

   With "reversed" the lowest bit of a word comes first: TestU01 looks at the upper bits of a
   number more closely than at the lower ones. With two numbers only these tests of BigCrush, which
   has 106, are run: the whole takes hours. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bbattery.h"
#include "swrite.h"
#include "unif01.h"

static int reversed;
static long long bytes_read;

static unsigned int next_word(void) {
    static unsigned int words[1 << 16];
    static size_t place, count;
    if (place == count) {
        place = 0;
        count = fread(words, sizeof *words, sizeof words / sizeof *words, stdin);
        if (count == 0) {
            puts("standard input has ended");
            exit(1);
        }
    }
    bytes_read += sizeof *words;
    unsigned int word = words[place++];
    if (reversed) {
        word = (word >> 1 & 0x55555555) | (word & 0x55555555) << 1;
        word = (word >> 2 & 0x33333333) | (word & 0x33333333) << 2;
        word = (word >> 4 & 0x0f0f0f0f) | (word & 0x0f0f0f0f) << 4;
        word = __builtin_bswap32(word);
    }
    return word;
}

int main(int count, char **arguments) {
    const char *battery = count > 1 ? arguments[1] : "SmallCrush";
    reversed = count > 2 && strcmp(arguments[2], "reversed") == 0;
    int tests[107] = {0}; /* how often each one is run, from 1 on */
    for (int test = 1; count > 3 && test < 107; test++)
        tests[test] = atoi(arguments[2]) <= test && test <= atoi(arguments[3]);
    setvbuf(stdout, NULL, _IOLBF, 0); /* a run that is stopped leaves what it has found */
    unif01_Gen *words = unif01_CreateExternGenBits("standard input", next_word);
    if (strcmp(battery, "SmallCrush") == 0) bbattery_SmallCrush(words);
    else if (strcmp(battery, "Crush") == 0) bbattery_Crush(words);
    else if (strcmp(battery, "BigCrush") == 0 && count > 3) bbattery_RepeatBigCrush(words, tests);
    else if (strcmp(battery, "BigCrush") == 0) bbattery_BigCrush(words);
    else { fprintf(stderr, "SmallCrush, Crush or BigCrush, not %s\n", battery); return 2; }
    unif01_DeleteExternGenBits(words);
    printf("%lld bytes read\n", bytes_read);
    return 0;
}
