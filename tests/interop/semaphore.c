/* The other side of Semaphore(value, "posix+sem://name"): waits for a unit, says so, gives it back when it is told to. */
#include <fcntl.h>
#include <semaphore.h>
#include <stdio.h>

int main(int count, char **words)
{
    if (count != 2)
        return 2;
    sem_t *pool = sem_open(words[1], O_CREAT, 0600, 1);
    if (pool == SEM_FAILED) {
        perror("sem_open");
        return 1;
    }
    char line[16];
    while (fgets(line, sizeof line, stdin)) {
        if (line[0] == 'w' ? sem_wait(pool) : sem_post(pool)) {
            perror("semaphore");
            return 1;
        }
        puts(line[0] == 'w' ? "have it" : "gave it");
        fflush(stdout);
    }
    return sem_close(pool);
}
